"""An edit on a model: the config, the PEFT tuner, a running forward, the saved folder."""

import peft  # noqa: F401 (first, since loading it registers the tuner, which needs what is here whole)
