"""How exactly the models of transformers train cut: ``python -m bench.models [model_type ...] [--out FILE]``.

Every ``model_type`` that transformers registers for causal LM is shrunk to two to four layers that contain every kind
it has, every number of it is drawn, and it runs in fp64: itself, each document alone, and cut over 1 to 4 ranks. What
is exact (loss, logits and every gradient to 1e-9) is what ``--record`` puts on the list of what ``sequence_parallel``
takes. One core; stops by itself after ``--seconds``.
"""

import argparse
import json
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench.models.hf.measure import LENGTHS, WORLDS, Measured, measure

RECORD = Path(__file__).parents[2] / "seqpar" / "hf" / "measured.json"
EACH = 60  # seconds for one model


def main() -> None:
    """Measure, print a line for each, and write."""
    arguments = _arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _too_long)
    rows = {row["model_type"]: row for row in _read(arguments.out)}
    end = time.monotonic() + arguments.seconds
    part, parts = map(int, arguments.slice.split("/"))
    for model_type in (arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))[part::parts]:
        if time.monotonic() > end:
            print(f"stopped after {arguments.seconds} s; the rest is as it was")
            break
        found = _measured(model_type)
        print(f"{found.model_type:28} {found.outcome:8} {found.error or '':<22} {found.why}", flush=True)
        rows[model_type] = found.as_json()
        _write(arguments.out, rows)
    print(dict(Counter(row["outcome"] for row in rows.values())))
    if arguments.record:
        record(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="model_type", help="default: all that transformers registers")
    parser.add_argument("--out", type=Path, default=Path("bench/results/transformers.json"), metavar="FILE")
    parser.add_argument("--slice", default="0/1", metavar="i/n", help="only every n-th, from the i-th on")
    parser.add_argument("--seconds", type=int, default=1800, help="begin no model after so many (default: 1800)")
    parser.add_argument("--record", action="store_true", help="write the list of what sequence_parallel takes")
    return parser.parse_args()


def _measured(model_type: str) -> Measured:
    signal.alarm(EACH)
    try:
        return measure(model_type)
    except TimeoutError as error:
        return Measured(model_type, "broken", None, str(error))
    finally:
        signal.alarm(0)


def _too_long(*_: Any) -> NoReturn:
    raise TimeoutError(f"not done after {EACH} s")


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["models"] if path.exists() else []


def _write(path: Path, rows: dict[str, Any]) -> None:
    head = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "lengths": LENGTHS,
        "worlds": WORLDS,
        "models": [rows[name] for name in sorted(rows)],
    }
    path.write_text(json.dumps(head, indent=1) + "\n")


def record(rows: dict[str, Any]) -> None:
    """The list that ``seqpar.hf`` takes models from."""
    models = [
        {
            "model_type": name,
            "in_place": "exact" if row["outcome"] == "exact" else "refused",
            "converted": None,
            "error": row["error"] if row["outcome"] == "exact" else None,
            "modules": row["modules"],
            "layers": row["layers"],
            "why": _why(row),
        }
        for name, row in sorted(rows.items())
    ]
    RECORD.write_text(json.dumps({"transformers": transformers.__version__, "models": models}, indent=1) + "\n")


def _why(row: dict[str, Any]) -> str:
    if row["outcome"] == "wrong":
        return f"it differs by {row['error']:.1e} in {row['why']}"
    return f"it was not measured: {row['why']}" if row["outcome"] == "broken" else row["why"]


if __name__ == "__main__":
    main()
