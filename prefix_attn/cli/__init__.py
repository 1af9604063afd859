"""The command line. Torch and transformers are imported inside the commands, so that ``--help`` does not wait."""
