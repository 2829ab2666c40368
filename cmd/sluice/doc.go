// Command sluice asks the plugin on this host how it is and prints the answer.
//
//	sluice [--json] [--plugin NAME] [--socket PATH] VERB
//	sluice service NAME [--network NETWORK]
//	sluice entry [--port N[/PROTOCOL]]
//
// Its exit status is a verdict: 0 all is well, 1 the answer names problems,
// 2 there is no answer or the command was wrong.
package main
