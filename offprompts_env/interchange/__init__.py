"""Logged datasets from and to other people's formats; what a format cannot hold is said when it is dropped."""

from offprompts_env.interchange.csv_files import from_csv
from offprompts_env.interchange.d3rlpy import from_d3rlpy, to_d3rlpy
from offprompts_env.interchange.dataframe import from_dataframe, to_dataframe
from offprompts_env.interchange.huggingface import from_huggingface, to_huggingface
from offprompts_env.interchange.json_lines import from_json_lines, to_json_lines
from offprompts_env.interchange.minari import from_minari, to_minari
from offprompts_env.interchange.obp import from_obp, to_obp
from offprompts_env.interchange.parquet import convert_parquet, from_parquet, to_parquet
from offprompts_env.interchange.vowpal import from_vowpal, from_vowpal_adf, to_vowpal, to_vowpal_adf

__all__ = [
    "convert_parquet",
    "from_csv",
    "from_d3rlpy",
    "from_dataframe",
    "from_huggingface",
    "from_json_lines",
    "from_minari",
    "from_obp",
    "from_parquet",
    "from_vowpal",
    "from_vowpal_adf",
    "to_d3rlpy",
    "to_dataframe",
    "to_huggingface",
    "to_json_lines",
    "to_minari",
    "to_obp",
    "to_parquet",
    "to_vowpal",
    "to_vowpal_adf",
]
