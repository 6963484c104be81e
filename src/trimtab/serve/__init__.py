"""Many adapters on one model: the table of edits, the registry of names, the engine, HTTP."""
