"""Problems from files and data sets, and names that change with them."""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import write

from v05.errors import InputError
from v05.tasks.data import BENCHMARKS, Source, columns_digest, digest, read_data


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "dapo_math_17k"])
def test_benchmarks_are_read_in_the_format_that_the_hub_has(name: str, tmp_path: Path) -> None:
    from datasets import Dataset

    source = BENCHMARKS[name]
    answers: list[Any] = [["2", "-2"], ["$3$"]] if name == "olympiad_bench" else ["204", r"\frac{1}{2}"]
    if name == "amc_2023":
        answers = [27.0, 36.0]
    columns = {source.prompt_key: ["What is $1+1$?", "And then?"], source.answer_key: answers, "url": ["a", "b"]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns).to_parquet(tmp_path / "data" / f"{source.split}-00000-of-00001.parquet")
    local = Source(str(tmp_path), source.split, source.prompt_key, source.answer_key, source.template)
    records = read_data(local)
    assert records[0]["prompt"].startswith("What is $1+1$?\n\nPlease reason step by step")
    assert "\\boxed{}" in records[0]["prompt"]
    expected = {"olympiad_bench": ["2, -2", "$3$"], "amc_2023": ["27", "36"]}.get(name, ["204", r"\frac{1}{2}"])
    assert [record["answer"] for record in records] == expected
    assert records[1]["url"] == "b"
    with pytest.raises(InputError, match="cannot be loaded"):
        read_data(Source(str(tmp_path), "nowhere", source.prompt_key, source.answer_key))


def test_the_training_set_is_read_in_the_format_that_the_hub_has(tmp_path: Path) -> None:
    from datasets import Dataset

    turns = [[{"content": f"What is {number}?", "role": "user"}] for number in (1, 2, 1)]
    models = [{"ground_truth": str(number), "style": "rule"} for number in (1, 2, 1)]
    rows = {"data_source": ["math"] * 3, "prompt": turns, "reward_model": models}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    source = replace(BENCHMARKS["dapo_math_17k"], place=str(tmp_path / "train.parquet"))
    found = [(record["prompt"], record["answer"], record["data_source"]) for record in read_data(source)]
    assert found == [("What is 1?", "1", "math"), ("What is 2?", "2", "math")]
    several = write(tmp_path / "bad.jsonl", {"prompt": [*turns[0], *turns[1]], "answer": 1})
    with pytest.raises(InputError, match="allowed: text, or one turn of a conversation"):
        read_data(Source(several))


def test_files_are_read_and_bad_ones_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "x", "weight": 2}, {"prompt": "a", "answer": "1"}]
    file = write(tmp_path / "data.jsonl", *rows)
    assert read_data(Source(file)) == [
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "answer": "x", "weight": 2},
    ]
    Dataset.from_list([{"q": "a", "answer": "1"}]).to_parquet(tmp_path / "data.parquet")
    source = Source(str(tmp_path / "data.parquet"), prompt_key="q", template="Q: {prompt}")
    assert read_data(source) == [{"q": "a", "prompt": "Q: a", "answer": "1"}]
    bad = tmp_path / "bad.jsonl"
    for content, message in (
        ([{"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 2}], "a prompt with the answers '1' and '2'"),
        ([{"prompt": "a"}], "bad.jsonl:1: key 'answer' is missing; given: prompt"),
        ([{"question": "a"}], "bad.jsonl:1: key 'prompt' is missing"),
        ([{"prompt": "a", "answer": " "}], "bad.jsonl:1: answer is blank; allowed: an answer"),
        ([{"prompt": "a", "answer": []}], "bad.jsonl:1: answer is blank; allowed: an answer"),
        ([{"prompt": "a", "answer": float("nan")}], "bad.jsonl:1: key 'answer' is missing"),
        ([{"prompt": 3, "answer": 1}], "prompt is 3; allowed: text"),
        ([{"prompt": "\ud83d", "answer": 1}], "bad.jsonl:1: prompt has half a surrogate pair at character 0"),
        ([], "has no problem"),
    ):
        write(bad, *content)
        with pytest.raises(InputError, match=message):
            read_data(Source(str(bad)))
    assert read_data(Source(write(bad, {"prompt": "a"})), needs_answer=False) == [{"prompt": "a"}]
    values = [7, 7.0, 0.5, 1.5e-05, -2.5e22, [1, 2.0], "  x "]
    write(bad, *({"prompt": str(number), "answer": value} for number, value in enumerate(values)))
    found = [record["answer"] for record in read_data(Source(str(bad)))]
    assert found == ["7", "7", "0.5", "0.000015", str(int(-2.5e22)), "1, 2", "x"]
    bad.write_text('\n{"prompt": "a", "answer": 1}\n\n{"prompt": "b"}\n')
    with pytest.raises(InputError, match=r"bad.jsonl:4: key 'answer' is missing"):
        read_data(Source(str(bad)))
    for source, message in (
        (Source("missing.jsonl"), "No such file"),
        (Source("missing.parquet"), "no such file"),
        (Source(file, template="none"), "allowed: text with {prompt}"),
    ):
        with pytest.raises(InputError, match=message):
            read_data(source)


RECORDS = [{"prompt": "p" * (number + 1), "answer": "1"} for number in range(7)]


def test_digests_change_with_what_they_name() -> None:
    assert digest(RECORDS) != digest(RECORDS[::-1])
    columns = [{"hint": 1}, {"hint": 2}, {"hint": b"1"}, {"hint": {"at": [datetime.date(2026, 1, 2)]}}, {}]
    assert len({columns_digest([*RECORDS, RECORDS[0] | more]) for more in columns}) == len(columns)
    turned = dict(reversed((RECORDS[0] | columns[0]).items()))
    assert columns_digest([turned]) == columns_digest([RECORDS[0] | columns[0]])
    images = [[RECORDS[0] | {"image": object()}] for _ in range(2)]  # whose name is its address
    assert columns_digest(images[0]) == columns_digest(images[1])
