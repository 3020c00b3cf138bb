"""Typed configuration ⇄ CfgNode ⇄ YAML without loss; Mask2Former's YAML is understood; mistakes are named."""

from pathlib import Path

import pytest

from experiments.store.identity import eval_id, run_id
from mpformer.config.datasets import DATASETS, added
from mpformer.config.mask2former_yaml import defaults, from_cfg, from_yaml, to_cfg, to_yaml, with_overrides
from mpformer.config.paper_settings import setting, setting_names
from mpformer.config.presets import PRESETS
from mpformer.config.schema import Config, DatasetConfig, ShapesConfig, Toggles, valid_keys, validate
from mpformer.runtime.errors import UserError

SHAPES = Config(dataset=DatasetConfig(name="shapes", task="panoptic", shapes=ShapesConfig(side=96)))
ODD = SHAPES.replace(
    {
        "toggles": Toggles(mp_queries=True, guided_layers="first-4", mp_groups="budget-100", flip_noise=0.1),
        "dataset.train_images": 12,
        "dataset.augmentation.flip": False,
        "model.backbone.depth": 18,
        "model.backbone.norm": "GN",
        "model.attention_strides": (16, 8, 4),
        "model.decoder_layers": 6,
        "schedule.lr_schedule": "poly",
        "schedule.amp": "bf16",
        "schedule.clip_norm": 0.0,
        "evaluation.size_areas": (256, 1024),
        "evaluation.val_images": 7,
        "runtime.threads": 3,
        "seed": 5,
    }
)
NUCLEI = Config(dataset=DatasetConfig(name="nuclei", task="instance", crop=128))


@pytest.mark.parametrize("name", setting_names())
def test_paper_settings_survive_the_round_trip(name: str) -> None:
    config = setting(name)
    assert from_cfg(to_cfg(config)) == config


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("base", [SHAPES, ODD, NUCLEI, setting("coco/panoptic/swin-l-100ep")])
def test_presets_survive_both_round_trips(preset: str, base: Config, tmp_path: Path) -> None:
    config = base.replace({"toggles": PRESETS[preset].model_dump()})
    assert from_cfg(to_cfg(config)) == config
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(path) == config
    assert to_cfg(from_yaml(path)) == to_cfg(config)


def test_odd_values_survive() -> None:
    assert from_cfg(to_cfg(ODD)) == ODD


def test_mask2former_names_are_kept() -> None:
    cfg = to_cfg(setting("coco/panoptic/swin-l-100ep"))
    assert cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES == 200
    assert cfg.MODEL.MASK_FORMER.DEC_LAYERS == 10
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 133
    assert cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES == ["res3", "res4", "res5"]
    assert cfg.MODEL.SWIN.EMBED_DIM == 192
    assert cfg.SOLVER.CLIP_GRADIENTS == {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 0.01, "NORM_TYPE": 2}
    assert cfg.SOLVER.AMP.ENABLED
    assert cfg.INPUT.DATASET_MAPPER_NAME == "coco_panoptic_lsj"
    assert cfg.DATASETS.TRAIN == ("coco_2017_train_panoptic",)
    mini = to_cfg(ODD)
    assert mini.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES == ["res2", "res3", "res4"]
    assert mini.MODEL.MASK_PILOTING.GUIDED_LAYERS == "first-4"


def test_every_field_has_a_key_of_its_own() -> None:
    from mpformer.config.mask2former_yaml import _DERIVED_FIELDS, _derived_keys, _links

    links = _links()
    assert {link.field for link in links} | _DERIVED_FIELDS == set(valid_keys())
    keys = [link.key for link in links]
    assert len(keys) == len(set(keys))
    assert not set(keys) & _derived_keys()


BASE_YAML = """
MODEL:
  BACKBONE: {FREEZE_AT: 0, NAME: "build_resnet_backbone"}
  WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  RESNETS: {DEPTH: 50, STEM_TYPE: "basic", STRIDE_IN_1X1: False, RES5_MULTI_GRID: [1, 1, 1],
            OUT_FEATURES: ["res2", "res3", "res4", "res5"]}
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.0001
  STEPS: (327778, 355092)
  MAX_ITER: 368750
  WARMUP_FACTOR: 1.0
  WARMUP_ITERS: 10
  WEIGHT_DECAY: 0.05
  OPTIMIZER: "ADAMW"
  BACKBONE_MULTIPLIER: 0.1
  CHECKPOINT_PERIOD: 2500
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 0.01, NORM_TYPE: 2.0}
  AMP: {ENABLED: True}
INPUT: {IMAGE_SIZE: 1024, MIN_SCALE: 0.1, MAX_SCALE: 2.0, FORMAT: "RGB", DATASET_MAPPER_NAME: "coco_instance_lsj"}
TEST: {EVAL_PERIOD: 5000}
VERSION: 2
"""
YAML = """
_BASE_: base.yaml
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    IGNORE_VALUE: 255
    NUM_CLASSES: 80
    LOSS_WEIGHT: 1.0
    CONVS_DIM: 256
    MASK_DIM: 256
    NORM: "GN"
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: ["res3", "res4", "res5"]
    COMMON_STRIDE: 4
    TRANSFORMER_ENC_LAYERS: 6
  MASK_FORMER:
    TRANSFORMER_DECODER_NAME: "MultiScaleMaskedTransformerDecoder"
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    DEEP_SUPERVISION: True
    NO_OBJECT_WEIGHT: 0.1
    CLASS_WEIGHT: 2.0
    MASK_WEIGHT: 5.0
    DICE_WEIGHT: 5.0
    HIDDEN_DIM: 256
    NUM_OBJECT_QUERIES: 100
    NHEADS: 8
    DROPOUT: 0.0
    DIM_FEEDFORWARD: 2048
    ENC_LAYERS: 0
    PRE_NORM: False
    ENFORCE_INPUT_PROJ: False
    SIZE_DIVISIBILITY: 32
    DEC_LAYERS: 10
    TRAIN_NUM_POINTS: 12544
    OVERSAMPLE_RATIO: 3.0
    IMPORTANCE_SAMPLE_RATIO: 0.75
    TEST: {SEMANTIC_ON: False, INSTANCE_ON: True, PANOPTIC_ON: False,
           OVERLAP_THRESHOLD: 0.8, OBJECT_MASK_THRESHOLD: 0.8}
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE_YAML)
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path / "run.yaml"


def test_mask2former_yaml_with_base_is_the_paper_setting(yaml_file: Path) -> None:
    expected = setting("coco/instance/r50-50ep")
    assert from_yaml(yaml_file).replace({"runtime": expected.runtime.model_dump()}) == expected


#: what differs from COCO in Mask2Former's files of the other two datasets
CROPPED = """
_BASE_: {base}
MODEL:
  RESNETS: {{NORM: "{norm}"}}
  SEM_SEG_HEAD: {{NUM_CLASSES: {classes}}}
  MASK_FORMER: {{TEST: {{SEMANTIC_ON: True, INSTANCE_ON: {panoptic}, PANOPTIC_ON: {panoptic}}}}}
DATASETS:
  TRAIN: ("{data}_train",)
  TEST: ("{data}_val",)
SOLVER: {{MAX_ITER: {length}, WARMUP_ITERS: 0, LR_SCHEDULER_NAME: "WarmupPolyLR"}}
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * {side}) for x in range(5, 21)]"]
  MIN_SIZE_TRAIN_SAMPLING: "choice"
  MIN_SIZE_TEST: {side}
  MAX_SIZE_TRAIN: {longest}
  MAX_SIZE_TEST: {test}
  CROP:
    ENABLED: True
    TYPE: "absolute"
    SIZE: {crop}
    SINGLE_CATEGORY_MAX_AREA: 1.0
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: 512
  DATASET_MAPPER_NAME: "mask_former_{task}"
TEST: {{AUG: {{ENABLED: False, MIN_SIZES: [256, 384, 512], MAX_SIZE: 3584, FLIP: True}}}}
DATALOADER: {{FILTER_EMPTY_ANNOTATIONS: True}}
"""


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "ade20k/semantic/r50-160k-poly",
            {"data": "ade20k_sem_seg", "norm": "FrozenBN", "classes": 150, "length": 160000, "side": 512,
             "longest": 2048, "test": 2048, "crop": "(512, 512)"},
        ),
        (
            "cityscapes/panoptic/r50-90k-poly",
            {"data": "cityscapes_fine_panoptic", "norm": "SyncBN", "classes": 19, "length": 90000, "side": 1024,
             "longest": 4096, "test": 2048, "crop": "(512, 1024)"},
        ),
    ],
)  # fmt: skip
def test_the_other_datasets_yaml_is_the_paper_setting_with_its_identity(
    yaml_file: Path, name: str, values: dict
) -> None:
    """With the list of sizes that Mask2Former's files compute, and test-time augmentation described but off."""
    task = name.split("/")[1]
    text = CROPPED.format(base=yaml_file.name, task=task, panoptic=task == "panoptic", **values)
    (yaml_file.parent / "other.yaml").write_text(text)
    config, expected = from_yaml(yaml_file.parent / "other.yaml"), setting(name)
    assert config.replace({"runtime": expected.runtime.model_dump()}) == expected
    assert run_id(config) == run_id(expected)
    assert eval_id(config) == eval_id(expected)


def test_overrides(yaml_file: Path) -> None:
    overrides = ["SOLVER.BASE_LR", "1e-3", "MODEL.MASK_PILOTING.MP_QUERIES", "True", "MODEL.MASK_PILOTING.MP_GROUPS"]
    config = from_yaml(yaml_file, [*overrides, "5", "MODEL.MASK_PILOTING.POINT_NOISE", "1", "SOLVER.STEPS", "(10, 20)"])
    assert config.schedule.base_lr == 1e-3
    assert config.toggles.mp_queries
    assert config.toggles.mp_groups == 5
    assert config.toggles.point_noise == 1.0
    assert config.schedule.steps == (10, 20)


UNREAD = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]


def test_keys_that_nothing_reads_are_refused(yaml_file: Path) -> None:
    with pytest.raises(UserError, match=r"^nothing here reads DATALOADER.SAMPLER_TRAIN: leave it out, .*$"):
        from_yaml(yaml_file, [*UNREAD, "OUTPUT_DIR", "here"])
    with pytest.raises(UserError, match=r"^nothing here reads MODEL.ROI_HEADS.NUM_CLASSES: .*$"):
        with_overrides(SHAPES, ["MODEL.ROI_HEADS.NUM_CLASSES", str(defaults().MODEL.ROI_HEADS.NUM_CLASSES)])
    with pytest.raises(UserError, match=r"^nothing here reads MODEL.RESNETS.NUM_GROUPS: .*$"):
        with_overrides(setting("coco/instance/r50-12ep"), ["MODEL.RESNETS.NUM_GROUPS", "2"])
    yaml_file.write_text(yaml_file.read_text() + "\nDATALOADER: {SAMPLER_TRAIN: RepeatFactorTrainingSampler}\n")
    with pytest.raises(UserError, match=r"nothing here reads DATALOADER.SAMPLER_TRAIN"):
        from_yaml(yaml_file)


def test_detectron2s_default_may_be_written_out_in_a_file_but_is_no_override(yaml_file: Path) -> None:
    """A file may be a dump of every key; who overrides a key expects something of it."""
    plain = from_yaml(yaml_file)
    with pytest.raises(UserError, match=r"^nothing here reads MODEL.ROI_HEADS.NUM_CLASSES: .*$"):
        from_yaml(yaml_file, ["MODEL.ROI_HEADS.NUM_CLASSES", "80"])
    yaml_file.write_text(yaml_file.read_text() + "\nDATALOADER: {SAMPLER_TRAIN: TrainingSampler}\n")
    assert from_yaml(yaml_file, ["OUTPUT_DIR", "x"]) == plain


def test_a_stored_configuration_with_such_keys_stays_readable() -> None:
    """Runs of earlier versions have them; the CfgNode and the YAML of such a run are those of what was read."""
    tree = {**SHAPES.model_dump(), "extra_cfg": {"SOLVER.NESTEROV": True}}
    stored = validate(tree)
    assert stored.extra_cfg == {"SOLVER.NESTEROV": True}
    assert stored.replace({"seed": 3}).extra_cfg == stored.extra_cfg
    assert to_cfg(stored) == to_cfg(SHAPES)
    for key in ("extra_cfg.SOLVER.NESTEROV", "extra_cfg"):
        with pytest.raises(UserError, match=r"^nothing here reads .*$"):
            stored.replace({key: True})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASE_LRR", "1"], "unknown key 'SOLVER.BASE_LRR'; nearest: SOLVER.BASE_LR"),
        (["BASE_LR", "1"], "nearest: SOLVER.BASE_LR"),
        (["MODEL.MASK_FORMER.LB_NOISE_RATIO", "0.2"], "nearest: MODEL.MASK_PILOTING.FLIP_NOISE"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR takes a float such as"),
        (["SOLVER.BASE_LR"], "has no partner"),
        (["SOLVER", "1"], "unknown key 'SOLVER'"),
        (["SOLVER.OPTIMIZER", "SGD"], "not implemented here; valid: 'ADAMW'"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"], "valid: WarmupMultiStepLR, WarmupPolyLR"),
        (["DATASETS.TRAIN", "('voc_2007_train',)"], "valid: ade20k_instance_train"),
        (["DATASETS.TEST", "('coco_2017_test-dev',)"], "valid: coco_2017_val"),
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "81"], "does not fit coco instance; valid: 80"),
        (["MODEL.MASK_PILOTING.GUIDED_LAYERS", "last"], "valid: first, first-k"),
        (["INPUT.DATASET_MAPPER_NAME", "mine"], "valid: mask_former_<task>"),
        (["TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED = True is not implemented here; valid: False"),
        (["INPUT.RANDOM_FLIP", "vertical"], "valid: horizontal, none"),
        (["MODEL.BACKBONE.NAME", "mine"], "valid: build_resnet_backbone, D2SwinTransformer"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"], "full_model"),
    ],
)
def test_mistakes_are_named(yaml_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        from_yaml(yaml_file, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration file"):
        from_yaml(tmp_path / "none.yaml")
    bad = ("a: [", "- 1\n- 2", "!!python/object/apply:os.system ['true']", "", "_BASE_: bad.yaml", "a: \xff\x00")
    for text in (*bad, "INPUT: {MIN_SIZE_TRAIN: !!python/object/apply:eval ['__import__(\"os\").getcwd()']}"):
        (tmp_path / "bad.yaml").write_text(text, encoding="latin1")
        with pytest.raises(UserError, match=r"cannot read bad.yaml") as error:
            from_yaml(tmp_path / "bad.yaml")
        assert "\n" not in str(error.value)
    (tmp_path / "bad.yaml").write_text("_BASE_: gone.yaml")
    with pytest.raises(UserError, match=r"cannot read gone.yaml"):
        from_yaml(tmp_path / "bad.yaml")


def test_defaults_are_fresh_each_time() -> None:
    defaults().MODEL.MASK_FORMER.NHEADS = 3
    assert defaults().MODEL.MASK_FORMER.NHEADS == 8


MAPILLARY = """
_BASE_: run.yaml
MODEL:
  SEM_SEG_HEAD: {NUM_CLASSES: 65}
  MASK_FORMER:
    NUM_OBJECT_QUERIES: 200
    TEST: {SEMANTIC_ON: True, INSTANCE_ON: True, PANOPTIC_ON: True, OBJECT_MASK_THRESHOLD: 0.0}
DATASETS:
  TRAIN: ("mapillary_vistas_panoptic_train",)
  TEST: ("mapillary_vistas_panoptic_val",)
SOLVER:
  MAX_ITER: 300000
  STEPS: (270000, 285000)
INPUT:
  CROP:
    ENABLED: True
    TYPE: "absolute"
    SIZE: (1024, 1024)
    SINGLE_CATEGORY_MAX_AREA: 1.0
  MIN_SIZE_TRAIN: (1024, 1536, 2048)
  MAX_SIZE_TRAIN: 4096
  COLOR_AUG_SSD: True
  DATASET_MAPPER_NAME: "mask_former_panoptic"
"""


def test_a_yaml_names_a_set_of_the_users_own(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `data add` registers is called in Mask2Former's way, so that its file for Mapillary Vistas works."""
    file = yaml_file.parent / "mapillary.yaml"
    file.write_text(MAPILLARY)
    with pytest.raises(UserError, match=r"unknown DATASETS\.TRAIN"):
        from_yaml(file)
    things, stuff = ([f"{kind}{n}" for n in range(count)] for kind, count in (("thing", 37), ("stuff", 28)))
    monkeypatch.setitem(DATASETS, "mapillary_vistas", added("mapillary_vistas", things, stuff))
    config = from_yaml(file)
    assert (config.dataset.name, config.dataset.task, config.model.queries) == ("mapillary_vistas", "panoptic", 200)
    assert config.dataset.added is not None
    assert len(config.dataset.added.things) == 37
    assert from_cfg(to_cfg(config)) == config
    sets = [
        "DATASETS.TRAIN",
        "('mapillary_vistas_sem_seg_train',)",
        "DATASETS.TEST",
        "('mapillary_vistas_sem_seg_val',)",
    ]
    semantic = from_yaml(file, [*sets, "INPUT.DATASET_MAPPER_NAME", "mask_former_semantic"])
    assert semantic.dataset.task == "semantic"
    with pytest.raises(UserError, match="NUM_CLASSES"):
        from_yaml(file, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "66"])
