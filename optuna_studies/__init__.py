"""Definitions and results of the Optuna studies that the yml values come from. Installed as ``sb3_ext.optuna_studies``."""
