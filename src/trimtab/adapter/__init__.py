"""An edit on a model: the config, the PEFT tuner, a running forward, the saved folder."""
