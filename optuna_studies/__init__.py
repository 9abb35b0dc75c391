"""Place of the definitions and results of Optuna studies. Installed as ``sb3_ext.optuna_studies``; there are none yet."""
