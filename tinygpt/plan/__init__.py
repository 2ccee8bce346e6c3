"""From a text, a machine and some minutes to params.yaml."""
