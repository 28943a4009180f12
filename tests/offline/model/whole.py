"""Models as transformers runs them whole."""

import json

import torch
import transformers

from tests.offline import own_code
from tests.offline.conftest import NEMOTRON_OMNI, PUBLISHED, VISION, WRITTEN_AS, config_class


def whole_model(path):
    """The model in a directory, float32, also of a type that transformers knows under another name only."""
    auto, settings = transformers.AutoModelForCausalLM, json.loads((path / "config.json").read_bytes())
    if "vision_config" in settings:
        auto = transformers.AutoModelForImageTextToText
    elif "thinker_config" in settings:
        auto = transformers.AutoModelForMultimodalLM
    config = None
    if (own_type := settings.pop("model_type")) == "step3p5":
        # Only as a part of a model that also sees.
        auto, settings = transformers.AutoModelForImageTextToText, {"text_config": settings, "vision_config": VISION}
    names = {}
    if own_type in NEMOTRON_OMNI:
        settings, names = settings["llm_config"], {"key_mapping": {r"^language_model\.": ""}}
        # Its infinity is spelled in a way that transformers understands in whole files alone.
        del settings["time_step_limit"]
    if own_type in own_code.CONFIGS:
        settings |= {key: settings[own] for key, own in own_code.KEYS.items() if own in settings}
    if own_type in {*WRITTEN_AS, *PUBLISHED}:
        config = config_class(WRITTEN_AS.get(own_type, own_type))(**settings)
    model = auto.from_pretrained(path, config=config, dtype=torch.float32, experts_implementation="eager", **names)
    return model.eval()
