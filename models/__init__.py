"""Which tokens each decoder layer sees, and everything that has to hold for it: executor, policies, students, weights.

A *policy* answers for one prompt which vision tokens each layer sees. `attach` puts it on a Hugging Face model; the
*executor* carries it out around the layers: tokens that leave are gathered out of the hidden states, and the model
around the layers goes on as if nothing had been removed. To read the core, in this order:

1. `schedule.py`: `VisionSchedule`, the policy that is known ahead of time;
2. `policies/base.py`: what any policy is asked, and what it is shown (`Prompt`, `Selection`, `AttentionCall`);
3. `executor/layout.py`: rows from full to compact and back;
4. `executor/tokens.py` (what a forward brings), `executor/segment.py` and `executor/forward.py`: one forward, layer by
   layer; tokens leave in `Forward._switch`;
5. `executor/cache.py` and `executor/masks.py`: the KV cache and the masks of what is left; `executor/recurrence.py`:
   layers that run a recurrence in place of attention;
6. `executor/hooks.py` and `attach.py`: how this reaches a model, and what users see of it;
7. where a policy needs them: `executor/attention.py` (shows it a layer's attention), `executor/frozen_rows.py` (tokens
   that are only read), `executor/entering.py` (the entry adapter), `executor/trace.py` (what happened).

`flops.py` counts what a prefill costs; `explain.py` and `picture.py` show it. `student/` builds and saves what is
trained, `embedded/` is the small model that ships here.
"""
