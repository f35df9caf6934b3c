"""The tests mirror the packages: `tests/cache_tools/codecs` tests `cache_tools/codecs`."""
