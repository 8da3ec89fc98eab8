"""Pre-trains an MoE language model, pruning and rearranging its experts on the way (LAEP).

    python train.py --gin_file=configs/tiny.gin --gin.LaepConfig.alpha=0.2 --workdir=runs/x

`python -m laep_jax train` is the same. Without --gin_file it takes configs/tiny.gin. Started again with
the same --workdir, it goes on from the newest checkpoint there. On several hosts each host runs this
command, see `laep_jax.hosts.connect`; `python -m laep_jax launch` tries that on one machine.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from laep_jax.errors import UserError, require
from laep_jax.gin_config import load_config, parse_arguments
from laep_jax.hosts import connect, leaving_at_once, num_processes
from laep_jax.sharding import make_cpu_devices
from laep_jax.training.ahead import is_compiling
from laep_jax.training.start import train

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.gin"  # of a checkout


def main(argv: Sequence[str]) -> int:
    gin_files, bindings, rest = parse_arguments(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="the folder where the run lives (default: runs/ and the config's name)")
    parser.add_argument("--gin_file", help="a config; may be given more than once")
    parser.add_argument("--gin.CLASS.FIELD", metavar="VALUE", help="a setting, over what the files say")
    parser.add_argument("--executable", type=Path, metavar="FILE", help="the step as `preflight --save` compiled it")
    arguments = parser.parse_args(rest)
    if not gin_files and not DEFAULT_CONFIG.is_file():
        raise UserError("--gin_file is needed: this installation of laep_jax has no configs/tiny.gin beside it")
    gin_files = gin_files or [str(DEFAULT_CONFIG)]
    config = load_config(gin_files, bindings)
    require("://" not in (arguments.workdir or ""), "--workdir", arguments.workdir, "must be a mounted folder")
    devices, processes = config.mesh.cpu_devices, num_processes()
    require(devices % processes == 0, "MeshConfig.cpu_devices", devices, f"is not divisible by {processes} processes")
    make_cpu_devices(devices // processes, processes=processes)
    with leaving_at_once(is_compiling):
        connect()
        workdir = arguments.workdir or f"runs/{Path(gin_files[-1]).stem}"
        train(config, workdir, executable=arguments.executable)
    return 0
