"""trimtab: representation fine-tuning (ReFT, LoReFT) as a PEFT method.

Importing it registers the method with PEFT, after which `get_peft_model` and `PeftModel.from_pretrained` know it.
"""

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.forward import prompts
from trimtab.adapter.tuner import ReftModel, set_scale
from trimtab.edits import METHODS
from trimtab.where.positions import Positions, parse_positions

__version__ = "0.1.0"
__all__ = ["METHODS", "Positions", "ReftConfig", "ReftModel", "__version__", "parse_positions", "prompts", "set_scale"]
