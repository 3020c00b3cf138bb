"""Memory of the records of a set of COCO's size, in the process that reads them and in its loader's workers.

    python -m benchmarks.records_memory [--images 118000 --masks 860000]

A COCO instance file is generated (polygons of 8 to 44 corners: as many images, masks and bytes as COCO's train2017
has) and read as training reads it, in a process of its own with torch and detectron2 loaded. Reported: the process's
peak, what the records take of it, and what a forked worker has of its own after it has read every record: pages that
are neither shared with the process nor with other workers, from ``smaps_rollup`` of Linux. With ``--as-dicts``, the
same records as dicts and lists too, as detectron2's reader gives them.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20


def write_index(path: Path, images: int, masks: int) -> None:
    """Write an instance file with the class list of COCO."""
    from mpformer.config.classes import category_ids, class_table

    draw = random.Random(0)
    rings = [_ring(draw) for _ in range(_RINGS)]
    ids, names = category_ids("coco", "instance"), class_table("coco", "instance").names
    categories = json.dumps([{"id": i, "name": name} for i, name in zip(ids, names, strict=True)])
    with path.open("w") as file:
        file.write('{"images":[')
        for number in range(1, images + 1):
            about = f'"id":{number},"file_name":"{number:012d}.jpg","height":480,"width":640'
            file.write(f"{',' * (number > 1)}{{{about}}}")
        file.write('],"annotations":[')
        for number in range(1, masks + 1):
            # a prime step: neighbours in the file are of different images, as in COCO's
            about = f'"id":{number},"image_id":{number * 7919 % images + 1},"category_id":{ids[number % len(ids)]}'
            about += f',"iscrowd":0,{rings[number % _RINGS]}'
            file.write(f"{',' * (number > 1)}{{{about}}}")
        file.write(f'],"categories":{categories}}}')


_RINGS = 1009
"""Different outlines; read, each object has numbers of its own all the same."""


def _ring(draw: random.Random) -> str:
    ring = [round(draw.uniform(0, 480), 2) for _ in range(2 * draw.randint(8, 44))]
    return f'"bbox":{json.dumps(ring[:4])},"area":{draw.uniform(100, 90000):.4f},"segmentation":[{json.dumps(ring)}]'


def private() -> int:
    """Bytes that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    fields = {line.split(":")[0]: line.split() for line in lines if line.endswith("kB")}
    return sum(1024 * int(fields[name][1]) for name in ("Private_Clean", "Private_Dirty"))


def resident() -> int:
    """Bytes in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def read(path: Path, as_dicts: bool) -> Sequence[dict[str, Any]]:
    """The records of an instance file."""
    if as_dicts:
        from detectron2.data.datasets.coco import load_coco_json

        return list(load_coco_json(str(path), "images", None, ["area"]))
    from mpformer.data.coco_reader import SplitFiles, read_coco_like

    return read_coco_like(SplitFiles("coco", Path("images"), path, suffix=".jpg"), frozenset({"instance"}))


def _work(records: Sequence[dict[str, Any]], out: Any) -> None:
    before, objects = private(), 0
    for index in range(len(records)):
        objects += len(records[index]["annotations"])
    out.put({"objects": objects, "own_mib": round((private() - before) / MIB, 1)})


def measure(path: Path, as_dicts: bool, workers: int) -> dict[str, Any]:
    """Read a file in this process, and its records in forked workers, which stay until all have been measured."""
    import torch  # noqa: F401

    from mpformer.data import loader  # noqa: F401

    before, began = resident(), time.process_time()
    records = read(path, as_dicts)
    seconds = time.process_time() - began
    after, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    context = multiprocessing.get_context("fork")
    out: Any = context.Queue()
    started = [context.Process(target=_work, args=(records, out)) for _ in range(workers)]
    for worker in started:
        worker.start()
    found = [out.get() for _ in started]
    for worker in started:
        worker.join()
    return {
        "records": "dicts" if as_dicts else "packed",
        "images": len(records),
        "peak_mib": round(peak / MIB),
        "resident_mib": round(after / MIB),
        "records_mib": round((after - before) / MIB),
        "read_processor_seconds": round(seconds, 1),
        "workers": found,
    }


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--images", type=int, default=118_000)
    asked.add_argument("--masks", type=int, default=860_000)
    asked.add_argument("--workers", type=int, default=2)
    asked.add_argument("--as-dicts", action="store_true")
    asked.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.file is not None:
        print(json.dumps(measure(given.file, given.as_dicts, given.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        write_index(path, given.images, given.masks)
        print(f"{path.stat().st_size / MIB:,.0f} MiB of JSON, {given.images:,} images, {given.masks:,} masks")
        for form in ([], ["--as-dicts"]) if given.as_dicts else ([],):
            words = ["-m", "benchmarks.records_memory", "--file", str(path), "--workers", str(given.workers), *form]
            subprocess.run([sys.executable, *words], check=True)


if __name__ == "__main__":
    main()
