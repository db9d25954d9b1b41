"""Logged datasets from and to other people's formats; what a format cannot hold is said when it is dropped."""

from offprompts_env.interchange.csv_files import from_csv
from offprompts_env.interchange.dataframe import from_dataframe, to_dataframe
from offprompts_env.interchange.huggingface import from_huggingface, to_huggingface
from offprompts_env.interchange.json_lines import from_json_lines, to_json_lines
from offprompts_env.interchange.parquet import convert_parquet, from_parquet, to_parquet

__all__ = [
    "convert_parquet",
    "from_csv",
    "from_dataframe",
    "from_huggingface",
    "from_json_lines",
    "from_parquet",
    "to_dataframe",
    "to_huggingface",
    "to_json_lines",
    "to_parquet",
]
