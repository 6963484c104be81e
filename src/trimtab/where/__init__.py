"""Which tokens and which modules are edited; knows no adapter."""
