"""The type checker behind jaxtyping's import hook: beartype, with an int accepted where a float is named, as Python's own typing rules say."""
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
