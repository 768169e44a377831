"""Train from a recipe: python launch/train.py +train=preview_dit [overrides]. The recipes are in recipes/train."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from sonic.train.settings import OBJECTIVE_CONFIGS, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("SONIC_ROOT", str(ROOT))
ConfigStore.instance().store(name="train_schema", node=TrainConfig)
for _name, _config in OBJECTIVE_CONFIGS.items():
    ConfigStore.instance().store(group="objective", name=_name, node=_config)


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(raw: DictConfig) -> None:
    """Compose, check, train in runs/<name>."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        config = OmegaConf.to_object(raw)
        from sonic.train.build import run_training

        folder = Path("runs") / config.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(raw))
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        run_training(config, folder, commit=commit or "unknown", command=" ".join(["python", *sys.argv]))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
