"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
DIGITS = ROOT / "tests" / "helpers" / "digits.yaml"  # without the ladder of configs/digits.yaml
GOLDEN = ROOT / "tests" / "golden"
