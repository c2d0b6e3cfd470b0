"""The style sheet of the cache page: no font and no picture from elsewhere."""

STYLE = """
:root { color-scheme: light; --ink: #23211c; --dim: #77726a; --line: #e6e1d6; --paper: #fbfaf7; --accent: #c8553d;
  --blue: #4c6a92; --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Helvetica Neue", "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--paper); margin: 0 auto; max-width: 1120px; padding: 2.2rem 1.4rem 5rem; }
h1 { font-size: 1.8rem; margin: 0; letter-spacing: -.01em; } h2 { font-size: 1.25rem; margin: 2.8rem 0 .2rem; }
h3 { font-size: 1.05rem; margin: 0; font-family: var(--mono); overflow-wrap: anywhere; }
h4 { font-size: .8rem; margin: 0 0 .5rem; color: var(--dim); font-weight: 600; }
code { font-family: var(--mono); font-size: .92em; } a { color: var(--accent); }
.dim { color: var(--dim); margin: .15rem 0 .9rem; font-size: .88rem; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0 1.6rem; }
.tiles div { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .65rem 1rem; flex: 1 1 auto;
  min-width: 7rem; }
.tiles b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tiles span { color: var(--dim); font-size: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .34rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.contents th:nth-child(-n+3), td.text { text-align: left; } td.text { white-space: normal; overflow-wrap: anywhere; }
.contents th:last-child, .contents td.track { text-align: left; } table td.track { width: 26%; min-width: 6rem; }
.contents td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; max-width: 20rem; }
.fill { display: block; height: .6rem; border-radius: 3px; background: var(--blue); min-width: 1px; }
.fill.size { background: #b9b2a3; } .fill.entropy { background: var(--accent); opacity: .8; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--dim); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .12rem 1rem; margin: .6rem 0 1rem;
  font-size: .85rem; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; } dl.code dd { font-family: var(--mono); }
.sample { background: #fff; border: 1px solid var(--line); border-radius: 14px; padding: 1.2rem 1.3rem 1.3rem;
  margin: 1.1rem 0; }
.top { display: flex; flex-wrap: wrap; gap: 1.3rem; align-items: flex-start; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; flex: 0 1 auto; max-width: 30rem; }
figure { margin: 0; } figcaption { font-size: .78rem; color: var(--dim); overflow-wrap: anywhere; max-width: 15rem; }
.figures img { display: block; max-width: 15rem; max-height: 17rem; border-radius: 8px; border: 1px solid var(--line);
  margin-bottom: .35rem; }
.figures img.pixels { width: 11rem; image-rendering: pixelated; }
.missing { width: 13rem; padding: 1.4rem .8rem; border: 1px dashed #cfc8b8; border-radius: 8px; color: var(--dim);
  font-size: .8rem; text-align: center; margin-bottom: .35rem; overflow-wrap: anywhere; }
.right { flex: 1 1 24rem; min-width: 0; }
.talk { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .95rem; line-height: 1.65;
  background: #f7f5ef; border-radius: 10px; padding: .8rem 1rem; max-height: 26rem; overflow-y: auto; }
.prompt { color: #5b564d; }
.image { background: #e7ecf3; color: var(--blue); border-radius: 5px; padding: .05rem .45rem; font-size: .8rem; }
.answer { font-family: var(--mono); font-size: .92em; }
.token { display: inline-block; line-height: 1.3; border-radius: 4px; padding: .05rem .18rem; margin-right: 1px;
  box-shadow: inset 0 -1px 0 rgba(0, 0, 0, .18); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(16.5rem, 1fr)); gap: .8rem;
  margin-top: 1.1rem; }
p.note { margin: 1rem 0 0; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .65rem .8rem .75rem; }
.card .head { display: flex; justify-content: space-between; gap: .6rem; align-items: baseline; }
.card .head code { font-size: 1.1rem; font-weight: 700; overflow-wrap: anywhere; white-space: pre-wrap; }
.card .head span { color: #b5ae9f; font-size: .78rem; }
.card p { margin: .1rem 0 .5rem; color: var(--dim); font-size: .77rem; font-variant-numeric: tabular-nums; }
.bar { display: grid; grid-template-columns: 5.6rem 1fr 4rem; gap: .5rem; align-items: center; font-size: .8rem;
  line-height: 1.45; }
.bar > :first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar > :last-child { white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; color: var(--dim); }
.bar i { color: var(--dim); }
.bar .track { background: #f3f0e8; border-radius: 3px; }
.bar.label > :first-child { font-weight: 700; color: var(--accent); } .bar.label .fill { background: var(--accent); }
.fill.hidden { background: #9fb0c6; } .fill.tail { background: #cfc8b8; }
.fill.sampled { background: repeating-linear-gradient(135deg, var(--blue) 0 3px, #b9c6d8 3px 6px); }
.bar.label .fill.sampled { background: repeating-linear-gradient(135deg, var(--accent) 0 3px, #ecc2b8 3px 6px); }
.key { margin: 2rem 0 -1.4rem; } .key .fill { display: inline-block; width: 1.6rem; margin: 0 .35rem 0 .8rem; }
.key .fill:first-child { margin-left: 0; } .fill.mark { background: var(--accent); }
.signals { margin-top: 1.3rem; border-top: 1px solid var(--line); padding-top: .9rem; }
.maps .row { display: flex; flex-wrap: wrap; gap: 1.8rem; } .maps + .maps { margin-top: 1rem; }
.heat { display: block; width: 13rem; max-height: 13rem; image-rendering: pixelated; border-radius: 6px;
  margin: .35rem 0; }
.heat.large { width: 22rem; max-height: 22rem; image-rendering: auto; }
.legend { display: flex; gap: .5rem; align-items: center; font-size: .75rem; color: var(--dim); width: 13rem;
  font-variant-numeric: tabular-nums; }
.ramp { flex: 1; height: .5rem; border-radius: 3px; }
.maps p.dim { font-size: .76rem; margin: .15rem 0 0; max-width: 22rem; }
.grid { display: grid; gap: 3px; margin-top: .35rem; }
.grid div { background: #f7f5ef; border-radius: 4px; padding: .3rem .4rem; min-width: 4.4rem; text-align: center;
  line-height: 1.25; font-size: .8rem; }
.grid small { display: block; color: var(--dim); font-size: .68rem; }
@media print { .talk { max-height: none; } .sample { break-inside: avoid; } }
"""
