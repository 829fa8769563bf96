"""What goes wrong elsewhere, and here not: one script a claim, run with the newest releases of the other tools.

    python -m benchmarks.elsewhere                  # all of them, kept in benchmarks/results/elsewhere.json
    python -m benchmarks.elsewhere lightning_resume # one

Each prints one JSON object: what the other tool does in its documented way, what this project does, and the versions.
"""
