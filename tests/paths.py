"""Where tests find what the repository holds."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL_REPOSITORY = ROOT / "model_repository"
DEMO_CHECKPOINT = ROOT / "builders" / "demo" / "checkpoint"
