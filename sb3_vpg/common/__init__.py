"""Internal building blocks of the public modules. Nothing here is part of the public API."""
