"""The verbs of video similarity, in the order in which a corpus needs them."""

from vkd import cli_pairs, cli_published, cli_retrieval, cli_search, cli_whiten

VERBS = (cli_whiten.whiten, cli_pairs.pairs, cli_published.adopt, cli_search.index, cli_search.search, cli_retrieval.retrieval)
