"""The door to lm-eval: its tasks put to any artifact, whatever the runtime.

Tasks are lm-eval's own (their data comes from the Hub, where there is a network or a cache), or YAML files of yours in
its format with data beside them. A task file is data: one that names Python functions is refused.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpc.errors import ConfigError, DataError
from hpc.runtimes.runner import Runner, Sampling

EXTRA = "pip install 'greenmoe[evaluate]'"


def ask(
    model: Runner, tasks: Sequence[str], context_length: int, prefix_id: int, limit: int | None
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, standard errors as metric_stderr.

    prefix_id: what stands before a text that has nothing before it. limit: examples of a task, all when None. Raises
    ConfigError where lm-eval is missing or does not know a task, DataError where a task's data cannot be read.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"tasks need lm-eval, which cannot be imported ({error}): {EXTRA}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    named = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_defaults=bool(named))  # its own tasks are thousands of files
    for task in named:
        if task not in manager.all_tasks:
            raise ConfigError(f"tasks: lm-eval has no {task!r}; `lm_eval ls tasks` lists them, a file ends in .yaml")
    asked = [task if task in named else read_task(Path(task)) for task in tasks]
    try:
        found = simple_evaluate(
            model=_adapted(model, context_length, prefix_id), tasks=asked, limit=limit, log_samples=False,
            bootstrap_iters=1000, task_manager=manager,
        )  # fmt: skip
    except (OSError, ConnectionError, ValueError, KeyError) as error:
        raise DataError(
            f"tasks {', '.join(tasks)}: the data cannot be read ({error}); fetch it where a network is"
        ) from None
    assert found is not None
    return {name: _figures(row) for name, row in found["results"].items()}


def read_task(path: Path) -> dict[str, Any]:
    """A task file, its data files made absolute. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"tasks: {path} cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        hint = "task files with functions are not run; " if "!function" in str(error) else ""
        raise ConfigError(f"tasks: {path} is not a task ({hint}{error})") from None
    if not isinstance(content, dict) or "task" not in content:
        raise ConfigError(f"tasks: {path} has no `task:` with a name: it is no task of lm-eval")
    files = (content.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        content["dataset_kwargs"]["data_files"] = {part: str(path.parent / name) for part, name in files.items()}
    elif isinstance(files, str):
        content["dataset_kwargs"]["data_files"] = str(path.parent / files)
    return content


def _figures(row: dict[str, Any]) -> dict[str, float]:
    """'acc,none' -> acc, and so on; what is no number stays out."""
    named = {key.split(",")[0]: value for key, value in row.items() if "," in key}
    return {key: float(value) for key, value in named.items() if isinstance(value, (int, float))}


def _adapted(model: Runner, context_length: int, prefix_id: int) -> Any:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapted(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
        """A Runner as lm-eval wants a model: one request at a time."""

        @property
        def eot_token_id(self) -> int:
            return prefix_id

        @property
        def tokenizer_name(self) -> str:
            return "greenmoe"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return model.encode(string)

        def _loglikelihood_tokens(self, requests: Iterable[Any], **_: Any) -> list[tuple[float, bool]]:
            return [_score(model, context, answer, context_length) for _, context, answer in requests]

        def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(model.encode(request.args[0]), prefix_id, context_length, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(sum(_score(model, context, answer, context_length)[0] for context, answer in pairs))
            return totals

        def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
            return [_write(model, request.args[0], request.args[1], context_length) for request in requests]

    return Adapted()


def _score(model: Runner, context: list[int], answer: list[int], context_length: int) -> tuple[float, bool]:
    """Log-likelihood (nats) of the answer's ids after the context's, and whether greedy text would be the same."""
    ids = [*context, *answer][-context_length - 1 :]
    logits = model.logits(ids[:-1])[-len(answer) :].astype(np.float64)
    targets = np.array(ids[-len(logits) :])
    top = logits.max(-1)
    places = np.arange(len(targets))
    losses = logits[places, targets] - top - np.log(np.exp(logits - top[:, None]).sum(-1))
    return float(losses.sum()), bool((logits.argmax(-1) == targets).all())


def _write(model: Runner, context: str, wanted: dict[str, Any], context_length: int) -> str:
    """Text after a context, until one of the task's stops."""
    stops = wanted.get("until") or []
    stops = [stops] if isinstance(stops, str) else stops
    most = min(int(wanted.get("max_gen_toks", 256)), context_length // 2)
    sampling = Sampling(float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0)
    new: list[int] = []
    text = ""
    for token in model.stream(model.encode(context)[-(context_length - most) :], most, sampling):
        new.append(token)
        text = model.decode(new)
        if any(stop in text for stop in stops):
            break
    return min((text.split(stop)[0] for stop in stops), key=len, default=text)
