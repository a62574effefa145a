"""Whether the tests can fail: faults planted in a copy of the source, one at a time, against the default tests.

`python -m tests.mutants.run --help` says how; generate.py makes faults mechanically, named.py lists faults of the kinds
that bit others, equivalent.json holds the generated ones that were proven to change nothing.
"""
