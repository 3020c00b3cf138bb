"""Seconds and memory of a paired bootstrap: 1,000 resamples of 5,000 images × 100 detections, AP over all areas,
one pair of runs.

    python benchmarks/analysis_bootstrap.py [resamples]
"""

import resource
import sys
import time

import numpy as np

from analysis import scores, statistics

IMAGES, DETECTIONS, CATEGORIES, OBJECTS = 5000, 100, 80, 7


def detections(seed: int) -> scores.Detections:
    """Simulated detections of one checkpoint: about half of 36,000 objects found at IoU 0.5, fewer at each higher
    threshold.
    """
    rng = np.random.default_rng(seed)
    truth_image = np.repeat(np.arange(IMAGES), OBJECTS)
    truth_category = rng.integers(0, CATEGORIES, len(truth_image))
    image = np.repeat(np.arange(IMAGES), DETECTIONS)
    category = rng.integers(0, CATEGORIES, len(image))
    quality = np.where(rng.random(len(image)) < 0.06, rng.uniform(0.3, 1, len(image)), 0)
    found = rng.random(len(image)) < 0.7
    score = (0.5 * quality + 0.5 * rng.random(len(image))).astype(np.float32)
    match = (quality[None] >= scores.IOU_THRESHOLDS[:, None]) & found
    ignore = np.broadcast_to(rng.random(len(image)) < 0.01, match.shape)
    return scores.build_detections(
        images=IMAGES,
        truth_image=truth_image,
        truth_category=truth_category,
        image=image,
        category=category,
        score=score,
        match=match,
        ignore=ignore,
    )


def main() -> None:
    resamples = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    start = time.perf_counter()
    first, second = detections(0), detections(1)
    print(f"sorting both runs   {time.perf_counter() - start:7.2f} s")
    start = time.perf_counter()
    result = statistics.paired_bootstrap(first.scores, second.scores, IMAGES, "AP", resamples=resamples)
    print(f"{resamples} resamples     {time.perf_counter() - start:7.2f} s")
    print(f"peak memory         {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:7.0f} MiB")
    print(result)


if __name__ == "__main__":
    main()
