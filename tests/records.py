"""The published records of V0 as rollout records: four rewards of each prompt, and the prior of an earlier step."""

import json
import os
import random
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("V05_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "v0_records"


def v0_folder() -> Path:
    """The folder of the records; without them a test is skipped with the reason, and fails where CI is set."""
    if FOLDER.is_dir():
        return FOLDER
    reason = f"the published V0 records are not at {FOLDER}; set V05_DATA to the folder that holds v0_records"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sparse_records(folder: Path, seed: int = 0) -> list[dict]:
    """Turns each score back into ten rewards and keeps four; the prior is the prompt's earlier score, or the mean."""
    rng = random.Random(seed)
    rows = read_lines(folder / "context.jsonl")
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    scores, contexts = {}, {}
    for row in rows:
        scores[row["model"], row["id"], row["step"]] = row["score"]
        contexts.setdefault((row["model"], row["step"]), []).append(row["score"])
    records = []
    for row in rows:
        solved = round((row["score"] + 1) / 2 * 10)
        rewards = rng.sample([1.0] * solved + [-1.0] * (10 - solved), 4)
        earlier = [
            step for (model, id_, step) in scores if (model, id_) == (row["model"], row["id"]) and step < row["step"]
        ]
        context = contexts[row["model"], row["step"]]
        prior = scores[row["model"], row["id"], max(earlier)] if earlier else sum(context) / len(context)
        text = prompts[f"{row['dataset']}_{row['id']}"]
        records.append({"prompt": text, "rewards": rewards, "prior": prior, "model": row["model"], "step": row["step"]})
    return records


def recorded_scores() -> list[float]:
    """Every score of the records."""
    return [row["score"] for row in read_lines(v0_folder() / "context.jsonl")]
