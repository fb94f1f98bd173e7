"""Parts of rival methods for VAR; the recipes of `conf/method` put them together."""
