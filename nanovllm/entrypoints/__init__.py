"""Commands and adapters for programs outside the package."""
