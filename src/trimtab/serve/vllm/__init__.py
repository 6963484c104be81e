"""Adapters on vLLM, without a fork of it: what is put into its processes, and an engine over it.

`plugin` is what vLLM loads in each process (the entry point `vllm.general_plugins`): `worker` edits the rows of a step,
`keys` tells blocks of the prefix cache apart. `engine` runs in the front end, and is all that knows adapters; what a
request carries to the other processes is `carried`. `probe` refuses what is not as the tests have seen it.
"""
