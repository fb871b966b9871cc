"""Raw text of any form to Arrow shards."""
