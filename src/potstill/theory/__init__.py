"""The identities of docs/theory.md, checked by enumeration."""
