"""Which tokens each decoder layer sees. Reading order: schedule, policies/base, executor/layout, executor/forward."""
