"""Scores of a run's model in the tasks of `experiments/tasks/`, by lm_eval, from the exported model.

lm_eval runs in a process of its own: rows that are not scored need neither it nor PyTorch.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.processes import run
from experiments.task_data import FOLDER, write_items
from laep_jax.checkpoint.saved import Saved
from laep_jax.errors import UserError
from laep_jax.export.folder import choose_form, write_folder
from laep_jax.files import read_json

TASKS = Path(__file__).parent / "tasks"
METRICS = {"laep_next_line": "acc", "laep_identifier": "acc", "laep_bits_per_byte": "bits_per_byte"}
BATCH_SIZE = 128


def require_lm_eval() -> None:
    """`UserError` where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("this experiment is scored by lm_eval, which is not installed: see requirements-hf.txt")


def score(run_dir: Path) -> dict[str, float]:
    """The metric of each task for the newest checkpoint of a run. `CalledProcessError` where lm_eval fails."""
    saved = Saved(str(run_dir))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_items(saved.config, folder / FOLDER)
        write_folder(saved, folder / "model", form=choose_form(saved, "auto"), dtype="float32")
        command = [sys.executable, "-m", "lm_eval", "--model=hf", f"--tasks={','.join(METRICS)}"]
        command += [f"--model_args=pretrained={folder / 'model'},trust_remote_code=True,dtype=float32"]
        command += [f"--include_path={TASKS}", f"--batch_size={BATCH_SIZE}", f"--output_path={folder / 'scores'}"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
        if code := run([*command, "--device=cpu"], offline, cwd=folder):
            raise subprocess.CalledProcessError(code, command)
        [path] = (folder / "scores").rglob("results_*.json")
        results = read_json(path, str(path))["results"]
    return {task: results[task][f"{metric},none"] for task, metric in METRICS.items()}
