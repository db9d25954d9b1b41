"""Logged datasets from and to other people's formats; what a format cannot hold is said when it is dropped."""

from offprompts_env.interchange.dataframe import from_dataframe, to_dataframe

__all__ = ["from_dataframe", "to_dataframe"]
