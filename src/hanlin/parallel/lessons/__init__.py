"""How the collectives work, each in a few lines: to read, to run, to measure. The rest of Hanlin does not import them.

    eight               the eight collectives out of sends and receives alone
    ring_all_reduce     the all-reduce of which every rank sends 2 (n-1)/n of the data, whatever n
    data_parallel       `nn.DataParallel`: one process, a thread a device, and why it was left behind

`python benchmarks/bench_collectives.py` measures them beside torch's.
"""
