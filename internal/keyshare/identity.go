package keyshare

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// Roles of a node, as swarm writes them into certificates: the subject's OU, and
// the name that a server is verified by (swarmkit ca/config.go, PrepareCSR).
const managerRole = "swarm-manager"

// ErrLocked: the node's private key is encrypted, as on managers of a swarm with
// autolock. Nothing but the engine, after `docker swarm unlock`, has it in clear.
var ErrLocked = errors.New("the swarm is autolocked, so this manager's key is encrypted on disk")

// Identity is what a node of a swarm proves itself with, as it was at one moment.
type Identity struct {
	Node    string // swarm's id of the node
	Swarm   string // the swarm's own id
	Manager bool   // the node was one when the certificate was made

	ends  time.Time // of the certificate
	cert  tls.Certificate
	roots *x509.CertPool
}

// Parse makes an Identity of what swarm keeps in its files: the node's
// certificate, which those that lead to a root may follow, its private key, and
// the roots, all PEM. The error is ErrLocked if the key is encrypted. No error
// repeats any of it.
func Parse(cert, key, roots []byte) (Identity, error) {
	if encrypted(key) {
		return Identity{}, ErrLocked
	}
	id := Identity{roots: x509.NewCertPool()}
	if !id.roots.AppendCertsFromPEM(roots) {
		return Identity{}, errors.New("the roots of the swarm: no certificate in it")
	}
	var err error
	if id.cert, err = tls.X509KeyPair(cert, key); err != nil {
		return Identity{}, fmt.Errorf("the node's certificate and key: %w", err)
	}
	leaf := id.cert.Leaf
	if id.Node, id.Swarm, id.Manager, err = subject(leaf.Subject); err != nil {
		return Identity{}, fmt.Errorf("the node's certificate: %w", err)
	}
	id.ends = leaf.NotAfter
	return id, nil
}

// encrypted reports whether a private key is, in the old form of PEM or in PKCS 8.
// Swarm's own headers (kek-version, raft-dek) say nothing of it.
func encrypted(key []byte) bool {
	block, _ := pem.Decode(key)
	return block != nil && (block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "")
}

// subject reads who a certificate is of.
func subject(n pkix.Name) (node, swarm string, manager bool, err error) {
	if n.CommonName == "" || len(n.Organization) != 1 || n.Organization[0] == "" || len(n.OrganizationalUnit) != 1 {
		return "", "", false, errors.New("it is not of a node of a swarm: a node's id, one swarm and one role are wanted in its subject")
	}
	return n.CommonName, n.Organization[0], n.OrganizationalUnit[0] == managerRole, nil
}

// peer is whose certificate the other side has shown, if it is of the same swarm.
// One CA may sign for several swarms (docker swarm init --external-ca): the chain
// alone does not tell.
func (id Identity) peer(state tls.ConnectionState) (node string, manager bool, err error) {
	if len(state.VerifiedChains) == 0 {
		return "", false, errors.New("the other side has shown no certificate")
	}
	node, swarm, manager, err := subject(state.PeerCertificates[0].Subject)
	switch {
	case err != nil:
		return "", false, fmt.Errorf("the other side's certificate: %w", err)
	case swarm != id.Swarm:
		return "", false, errors.New("the other side's certificate is of another swarm")
	}
	return node, manager, nil
}

// server is how a manager speaks to those who ask.
func (id Identity) server() *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{id.cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    id.roots,
		// Each connection is to be verified by what holds now.
		SessionTicketsDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			_, _, err := id.peer(s)
			return err
		},
	}
}

// client is how a node asks a manager.
func (id Identity) client() *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{id.cert},
		RootCAs:      id.roots,
		ServerName:   managerRole, // what swarm's own clients verify managers by
		VerifyConnection: func(s tls.ConnectionState) error {
			_, manager, err := id.peer(s)
			if err == nil && !manager {
				err = errors.New("the other side is no manager")
			}
			return err
		},
	}
}
