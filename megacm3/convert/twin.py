"""Ships `MegaCM3ForCausalLM` beside Chameleon exports, and tells transformers of it."""

import shutil
from pathlib import Path
from typing import Any

MODULE = "modeling_megacm3"
AUTO_MAP = {"AutoModel": f"{MODULE}.MegaCM3Model", "AutoModelForCausalLM": f"{MODULE}.MegaCM3ForCausalLM"}
"""Field of config.json by which the auto classes find ours in the folder, with trust_remote_code=True; without it
`AutoModel` gives transformers' own. vLLM builds the model by `AutoModel` and puts its own head on it."""


def ship(folder: Path) -> None:
    """Copy the class's file into an export."""
    shutil.copyfile(Path(__file__).with_name(f"{MODULE}.py"), folder / f"{MODULE}.py")


def register() -> Any:
    """Let `AutoModelForCausalLM` open Chameleon folders as MegaCM3ForCausalLM without remote code; return the class."""
    from transformers import AutoModelForCausalLM, ChameleonConfig

    from megacm3.convert.modeling_megacm3 import MegaCM3ForCausalLM

    AutoModelForCausalLM.register(ChameleonConfig, MegaCM3ForCausalLM, exist_ok=True)
    return MegaCM3ForCausalLM
