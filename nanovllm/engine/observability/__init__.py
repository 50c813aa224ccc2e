"""What an engine tells of its work."""
