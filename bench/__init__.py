"""The benchmark: Netloom beside Debian's reference plugins in one run, and ipamd on a real disk."""
