"""Pre-trains an MoE language model, pruning and rearranging its experts on the way (LAEP).

    python train.py --gin_file=configs/tiny.gin --gin.LaepConfig.alpha=0.2 --workdir=runs/x

Without --gin_file it takes configs/tiny.gin. Started again with the same --workdir, it goes on from the
newest checkpoint there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from laep_jax.errors import run_main
from laep_jax.gin_config import load_config, operative_config, parse_arguments
from laep_jax.sharding import make_cpu_devices
from laep_jax.training.loop import train

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.gin"


def main(argv: Sequence[str]) -> int:
    gin_files, bindings, rest = parse_arguments(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="where the run lives (default: runs/ and the config's name)")
    parser.add_argument("--gin_file", help="a config; may be given more than once")
    parser.add_argument("--gin.CLASS.FIELD", metavar="VALUE", help="a setting, over what the files say")
    workdir = parser.parse_args(rest).workdir
    gin_files = gin_files or [str(DEFAULT_CONFIG)]
    config = load_config(gin_files, bindings)
    make_cpu_devices(config.mesh.cpu_devices)
    train(config, workdir or Path("runs") / Path(gin_files[-1]).stem, settings=operative_config(config))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
