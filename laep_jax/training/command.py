"""`laep-jax train`, the same as `python train.py`; DESCRIPTION is its help."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import laep_jax
from laep_jax.commands import program
from laep_jax.distributed import connect, exit_without_barrier, num_processes
from laep_jax.errors import require
from laep_jax.gin_config import add_config_arguments, load_config, operative_config, or_default, parse_arguments
from laep_jax.paths import expanded, require_path
from laep_jax.sharding import make_cpu_devices
from laep_jax.switches import set_switches
from laep_jax.training.check import check
from laep_jax.training.initial import defaults
from laep_jax.training.profile import parse_steps
from laep_jax.training.prune.compile_ahead import is_compiling
from laep_jax.training.start import train
from laep_jax.training.watch import Watch, unwatched

DESCRIPTION = """\
Pre-trains an MoE language model, pruning and rearranging its experts on the way (LAEP).

    {prog} --gin_file=configs/tiny.gin --gin.LaepConfig.alpha=0.2 --workdir=runs/x

The default config takes a few minutes on two cores. Started again with the same --workdir, a run resumes from its
newest checkpoint. On several hosts each host runs this command; `{launch}` tries that on one machine.
"""


def main(argv: Sequence[str], watch: Watch = unwatched) -> int:
    gin_files, bindings, rest = parse_arguments(argv)
    arguments = _parser().parse_args(rest)
    init_from = arguments.init_from and expanded(arguments.init_from)
    require(not init_from or arguments.workdir is not None, "--init-from", init_from, "needs --workdir")
    gin_files = gin_files if init_from else or_default(gin_files)
    workdir = f"runs/{Path(gin_files[-1]).stem}" if arguments.workdir is None else expanded(arguments.workdir)
    require_path("--workdir", workdir, bucket=True)
    config = load_config(gin_files, bindings, defaults(init_from, workdir) if init_from else {})
    profile_steps = (
        parse_steps(arguments.profile_steps, config.train.num_steps) if arguments.profile_steps else range(0)
    )
    if arguments.print_config:
        print(operative_config(config), end="")
        return 0
    devices, processes = config.mesh.cpu_devices, num_processes()
    require(devices % processes == 0, "MeshConfig.cpu_devices", devices, f"is not divisible by {processes} processes")
    set_switches()
    make_cpu_devices(devices // processes, processes=processes)
    with exit_without_barrier(is_compiling):
        connect()
        if arguments.check:
            print("\n".join(check(config, workdir, arguments.executable, init_from)))
        else:
            options = {"executable": arguments.executable, "init_from": init_from, "profile_steps": profile_steps}
            train(config, workdir, **options, watch=watch)
            if jax.process_index() == 0:
                print(f"{workdir}: `{program('report')} {workdir}` draws it; evaluate, generate and export take it too")
    return 0


def _parser() -> argparse.ArgumentParser:
    prog = "python train.py" if Path(sys.argv[0]).name == "train.py" else program("train")
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config=NAME | --gin_file=FILE] [--gin.CLASS.FIELD=VALUE] [--workdir=DIR] ...",
        description=DESCRIPTION.format(prog=prog, launch=program("launch")),
        epilog=f"`{program('settings')}` lists every setting with its default, values and meaning.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="the run's folder, or gs://BUCKET/FOLDER (default: runs/ and the config's name)",
    )
    parser.add_argument(
        "--init-from",
        metavar="FOLDER",
        help="begin with the parameters, the settings of the model and the tokenizer of a Hugging Face folder, a run or"
        " one RUN/checkpoints/STEP of it; then there is no default config",
    )
    parser.add_argument("--executable", type=Path, metavar="FILE", help="the step as `preflight --save` compiled it")
    parser.add_argument(
        "--profile-steps", metavar="FIRST:LAST", help="trace these steps with jax.profiler into RUN/profile"
    )
    parser.add_argument("--print-config", action="store_true", help="print every setting as gin text, and end")
    parser.add_argument("--check", action="store_true", help="do everything but the training: exit code 0 or 2")
    parser.add_argument("--version", action="version", version=f"laep_jax {laep_jax.__version__}")
    add_config_arguments(parser)
    return parser
