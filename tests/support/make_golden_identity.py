"""Write tests/golden/identity.json. Run it only together with a raised ``SCHEME``: old ids must stay what they are."""

import json
from pathlib import Path

from experiments.store.identity import eval_id, run_id
from experiments.suites.scales import base
from mpformer.config.schema import Config

GOLDEN = Path(__file__).parent.parent / "golden" / "identity.json"


def configs() -> list[Config]:
    """A plain run, a piloted one, one on real images, and one with everything unusual."""
    shapes = base("mini", "shapes").replace({"dataset.fingerprint": "0" * 64})
    changes = {"toggles.mp_groups": "budget-100", "schedule.steps": (90, 95)}
    piloted = {"toggles.mp_queries": True, "toggles.point_noise": 0.2, "toggles.flip_noise": 0.2}
    nuclei = base("mini", "nuclei").replace({"dataset.fingerprint": "1" * 64, "seed": 7})
    unusual = shapes.replace({**piloted, **changes}).model_copy(update={"extra_cfg": {"SOLVER.NESTEROV": True}})
    return [shapes, shapes.replace(piloted), nuclei, unusual]


if __name__ == "__main__":
    cases = [{"run_id": run_id(c), "eval_id": eval_id(c), "config": c.model_dump(mode="json")} for c in configs()]
    GOLDEN.write_text(json.dumps(cases, indent=1) + "\n")
