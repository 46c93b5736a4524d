"""The `netloom` command: what an operator asks of a host.

app          the command, its options, its exit statuses
status gc addresses pools completion      one file for each group of subcommands
daemon       the way to ipamd, and what its refusals become
documents    ipamd's answers as JSON documents, whose keys are stable
output       documents and tables, for programs and for people
failure      what ends the command, and with which status
"""
