"""What a checkpoint's configuration says about its transformer, without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights

from slideredit_rt.errors import SliderEditError

CONFIG_FILE = "config.json"


def meta_transformer(source: Path) -> Any:
    """The transformer that the `config.json` in `source` describes, on the `meta` device: names and shapes without weights.

    Raises:
        SliderEditError: no configuration, or none of a diffusers model.
    """
    path = source / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        model_class = getattr(diffusers, config["_class_name"])
        if not issubclass(model_class, diffusers.ModelMixin):
            raise TypeError(f"{config['_class_name']} is not a model")
        with init_empty_weights():
            return model_class.from_config(config).eval()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SliderEditError(
            f"cannot build the transformer that {str(path)!r} describes ({error}); download the checkpoint again"
        ) from error
