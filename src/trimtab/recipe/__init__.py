"""The YAML file: its schema, its errors by line, and `init`, which writes one."""
