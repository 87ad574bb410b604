def count(
    kind: int,
    units_last: bool,
    data: int,
    samples: int,
    units: int,
    positions: int,
    totals: tuple[int, ...],
    silent: int,
    asked: int,
    on: int,
    border_low: float,
    border_high: float,
    border_on: float,
    threads: int,
    out: int,
    /,
) -> bool: ...
def fire(
    on: int, samples: int, units: int, first_sample: int, fired: int, first_fired: int, unfired: int, /
) -> bool: ...
def settle(batch: int, sums: int, rest: int, n: int, /) -> None: ...
def use_threads(parallel: int, number: int, /) -> None: ...
