#!/usr/bin/env python
"""The entry for users of NeMo's launcher: `stages:`, a `cluster:` group, `container`, `base_results_dir`. The same as `trd launch`.

.venv-launch/bin/python tools/nemo_launcher.py experiment=opsd_qwen3_8b stages=[rollout,refine,train] cluster=bcm cluster.partition=h100
"""

import sys

from nemo.core.config import hydra_runner
from omegaconf import DictConfig, OmegaConf

from trd_megatron.launch.nemo_style import launch


@hydra_runner(config_path="nemo_launcher/conf", config_name="config")
def main(config: DictConfig) -> None:
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    sys.exit(launch({str(key): value for key, value in values.items()}))


if __name__ == "__main__":
    main()
