"""Speed of every op beside its rivals: `python -m benchmarks` appends to results.csv and writes RESULTS.md."""
