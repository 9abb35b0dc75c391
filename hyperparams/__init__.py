"""Hyperparameters in the RL Zoo's syntax, one ``<algorithm>.yml`` per zoo key. Installed as ``sb3_ext.hyperparams``."""
