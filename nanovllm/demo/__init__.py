"""The bundled demo model: a tiny Qwen3 checkpoint trained by tools/train_demo_model.py on questions.json."""

from pathlib import Path

DEMO_MODEL_PATH: str = str(Path(__file__).resolve().parent)
